"""How much a reader meets between the pixels and the number: files and functions of one step.

`python tests/test_reading_path.py` prints them. The step is in float64, where attention runs in its
short form; the form for float32 on a CPU, which a reader may skip, has two functions more.
"""
import collections
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))       # as a program it needs that
import detr_min  # noqa: E402
from detr_min import criterion  # noqa: E402
from detr_min.data import dataset  # noqa: E402
from detr_min.run import config, registry  # noqa: E402

PACKAGE = pathlib.Path(detr_min.__file__).parent
MOST_FILES, MOST_FUNCTIONS = 9, 36


def a_step():
    """DAC-DETR of the preset shapes in training, from a batch of two pictures to the loss."""
    detector = registry.build(config.preset("shapes", model="dac")).train().double()
    images, is_pad = torch.rand(2, 3, 128, 128).double(), torch.zeros(2, 128, 128, dtype=torch.bool)
    targets = [dataset.Target(torch.tensor([0, 3]), torch.tensor([[.3, .3, .2, .2],
                                                                  [.7, .6, .2, .3]]).double(), i,
                              (128, 128))
               for i in range(2)]

    def step():
        output = detector(images, is_pad)
        return criterion.total(criterion.detection_loss(output, targets, num_objects=4.0))
    return step


def functions_of(step):
    """Call it. Returns {file of the package: [its functions that ran, in the order of the file]}"""
    seen = collections.defaultdict(dict)

    def profile(frame, event, argument):
        code = frame.f_code
        path = pathlib.Path(code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and code.co_name[0] != "<":
            seen[str(path.relative_to(PACKAGE))][code.co_firstlineno] = getattr(
                code, "co_qualname", code.co_name)            # from Python 3.11 on
    sys.setprofile(profile)
    try:
        loss = step()
    finally:
        sys.setprofile(None)
    assert loss.isfinite() and loss > 0
    return {file: [found[line] for line in sorted(found)] for file, found in sorted(seen.items())}


def test_a_step_of_dac_detr_is_short_to_read():
    found = functions_of(a_step())
    count = sum(map(len, found.values()))
    assert {"attention.py", "decoder_dac.py", "matcher.py", "criterion.py"} <= set(found)
    assert len(found) <= MOST_FILES, found
    assert count <= MOST_FUNCTIONS, f"{count} functions: {found}"


if __name__ == "__main__":
    by_file = functions_of(a_step())
    for file, names in by_file.items():
        print(f"{file:16}{len(names):3}  {'  '.join(names)}")
    print(f"{len(by_file)} files, {sum(map(len, by_file.values()))} functions")
