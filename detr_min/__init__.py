"""DAC-DETR and Decoupled DETR (SD-DETR), one concept per file, to read beside the papers.

The files of this folder are the papers' equations. Read them in this order; a file imports only
from files above it:

    boxes  attention  backbone  encoder  proposals  decoder_base  decoder_dac  matcher   (DAC-DETR)
    attention_conditional  encoder_conditional  proposals_conditional  decoder_conditional
    decoder_decoupled  query_gen  tal_loss                                               (SD-DETR)
    decoder_decoupled_deformable                            (SD-DETR on DAC-DETR's base, optional)
    criterion  model                                                                        (both)

The folders may be skipped for the papers: `release` is what the authors' code adds, `data` loads
images and boxes, `run` trains, tests, saves and loads. To use a trained detector elsewhere:

    detector = detr_min.load("runs/dac_shapes")             # or a published .pth
    found = detector.detect("photo.jpg", threshold=0.4)     # {"boxes", "labels", "scores", "names"}

Shapes use these letters:

    B  images                    N  queries             M  objects in an image    C  classes
    D  width of the model        H  attention heads     L  feature levels         K  sampling points
    S  cells of all levels       P  matched pairs       T  query sets (SD-DETR: 2, else 1)
    E  denoising queries         G  groups of them      h, w  height and width of image or level

In query_gen, P counts the boxes of all images, B*N. Boxes are cxcywh in [0, 1] of the image unless
a suffix says otherwise (`_xyxy`, `_px`). In masks called `is_pad`, True means padding.
"""


def load(path, device="auto", dc5=False):
    """Load a trained detector that finds objects in pictures.

    Args:
        path    a run folder of train.py, a .pt file of one, or a published .pth
        device  auto | cpu | cuda | mps
        dc5     True for a published DC5 model of Conditional DETR whose file does not say so
    Returns:
        run.predictor.Predictor
    Raises:
        FileNotFoundError, ValueError: the file is missing, or is no checkpoint that fits
    """
    from .run import predictor              # here, so that `import detr_min` loads no torch
    return predictor.Predictor(path, device, dc5)
