"""The package as pages to browse: docstrings and equations left, code right, in reading order.

    pip install pycco              # once; nothing else here needs it
    python docs/browse.py          # docs/html/index.html; no network, no script, no font to fetch

pycco (https://github.com/pycco-docs/pycco) colours the code and sets the Markdown. The cut into
sections is ours, because pycco's own leaves a `def` line above its docstring and sets equations as
running text: here a function's docstring stands beside its `def`, and formulas keep their lines.
"""
import argparse
import ast
import html
import inspect
import pathlib
import re
import shutil
import sys

try:
    import markdown
    import pycco
    import pycco_resources
except ModuleNotFoundError as missing:
    sys.exit(f"docs/browse.py: {missing.name} is missing: pip install pycco")

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "detr_min"
PROGRAMS = "train", "eval"                                  # read after the package
FOLDERS = {"": "Files of the papers, in reading order", "release": "release: the authors' code",
           "data": "data: pictures and boxes", "run": "run: training, testing, saving, loading"}
GUIDES = {"reading_path": "Reading path", "glossary": "Glossary", "pictures": "Pictures",
          "use": "Use", "researcher": "Your idea", "release": "Release",
          "tables": "Tables", "differences": "Differences", "data": "Your data",
          "troubleshooting": "Troubleshooting", "limits": "Limits", "explorer": "Explorer"}
WRAPPED = 84            # a line of a formula at least this long was broken only by the editor
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><link rel="stylesheet" href="style.css"></head>
<body class="{kind}"><nav>{nav}</nav>
{body}
<nav>{nav}</nav></body></html>
"""
STYLE = """
html { scroll-padding-top: 3rem }
body { margin: 0; font: 16px/1.5 Georgia, "DejaVu Serif", serif; color: #222; background: #fff }
a { color: #1a4f8b; text-decoration: none } a:hover { text-decoration: underline }
nav { padding: .5rem 1.5rem; background: #f2f2ee; font: 14px/1.5 sans-serif; border: 1px #ddd;
      border-style: solid none; display: flex; gap: 1.5rem; flex-wrap: wrap }
nav:first-of-type { position: sticky; top: 0; z-index: 1 } nav .next { margin-left: auto }
code, pre, .eq, .code { font: 12.5px/1.55 "DejaVu Sans Mono", Menlo, Consolas, monospace }
.section { display: grid; grid-template-columns: minmax(20rem, 1fr) 47.5rem; max-width: 96rem }
.docs { padding: .6rem 1.5rem .9rem; min-width: 0; overflow-wrap: break-word }
.docs p { margin: .35rem 0 } .docs .lead { font-weight: 600 }
.docs h1 { margin: .4rem 0; font-size: 1.6rem }
.docs h2 { margin: .2rem 0; font: 600 15px/1.5 "DejaVu Sans Mono", Menlo, Consolas, monospace }
.code { background: #f7f7f4; border-left: 1px solid #ddd; padding: .6rem 1rem; overflow-x: auto }
.code pre { margin: 0; font-size: 12px } .code a { color: inherit; border-bottom: 1px dotted #888 }
.eq { font-size: 12px; background: #fff8e6; border-left: 3px solid #e0b84c; padding: .3rem .6rem;
      margin: .5rem 0 }
.eq div { white-space: pre-wrap; padding-left: 2ch; text-indent: -2ch }
.tag { font: 600 12px/1.5 sans-serif; color: #7a4b00; white-space: nowrap }
.docs h3 { margin: .5rem 0 .1rem; font: 600 13px/1.5 sans-serif; color: #666 }
.item { font-size: 14.5px; line-height: 1.45; padding-left: 1.5rem; text-indent: -1.5rem }
.guide main { max-width: 60rem; margin: 1rem auto 3rem; padding: 0 1.5rem }
.guide pre { background: #f7f7f4; padding: .6rem 1rem; overflow-x: auto }
.guide table { border-collapse: collapse } .guide img { max-width: 100% }
.guide td, .guide th { border: 1px solid #ddd; padding: .25rem .6rem; text-align: left;
                       vertical-align: top }
"""


def reading_order():
    """Names of the files as the package's and its folders' docstrings list them, then programs.

    Returns:
        {name: path}, name without folder; no name is used twice
    """
    found = {}
    for folder in FOLDERS:
        tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
        listed = re.search(r"\n\n((?:    .+\n)+)", ast.get_docstring(tree, clean=False)).group(1)
        found |= {name: PACKAGE / folder / f"{name}.py"         # "(DAC-DETR)" is not a file
                  for name in re.sub(r"\(.*?\)", "", listed).split()}
    return found | {name: ROOT / f"{name}.py" for name in PROGRAMS}


SOURCES = reading_order()


def source(name):
    return SOURCES[name]


def cut(text):
    """A source file as sections, in order: [(name or "", docstring or "", code without it)].

    Every function, class and method is one, what stands between them another. Nested functions stay
    with theirs, and a first method that says nothing with its class.
    """
    lines, sections, position = text.split("\n"), [], 0

    def until(end, name="", doc=None):
        """The lines from `position` to `end`, less those of an ast node that holds a docstring."""
        nonlocal position
        rows = range(position, end)
        if doc:
            rows = [row for row in rows if not doc.lineno <= row + 1 <= doc.end_lineno]
        code = "\n".join(lines[row] for row in rows).strip("\n")
        said = inspect.cleandoc(doc.value.value) if doc else ""
        if code.strip() or said:
            sections.append((name, said, code))
        position = end

    def visit(node, name, outer):
        """Sections of what a module or class holds; its own docstring goes with its first lines."""
        doc = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
        for child in node.body:
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            is_said = ast.get_docstring(child, clean=False) is not None
            if isinstance(node, ast.ClassDef) and name and not is_said:
                continue
            first = min(d.lineno for d in [child, *child.decorator_list]) - 1
            until(first, name, doc)
            name, doc = "", None
            inner = f"{outer}{child.name}"
            if isinstance(child, ast.ClassDef):
                visit(child, inner, f"{inner}.")
            else:
                until(child.end_lineno, inner, child.body[0] if is_said else None)
        until(getattr(node, "end_lineno", len(lines)), name, doc)
    visit(ast.parse(text), "", "")
    return sections


class Links:
    """Where every name of the package is on the pages."""

    def __init__(self, names):
        self.names = names
        self.anchors = {}                                   # "matcher.one_to_one": its href
        for name in names:
            self.anchors[f"{name}.py"] = f"{name}.html"
            for inner, _, _ in cut(source(name).read_text()):
                if inner:
                    self.anchors[f"{name}.{inner}"] = f"{name}.html#{inner}"

    def word(self, word, here):
        """The href of a word between backticks, of a page's own or of another's names; or None."""
        word = re.sub(r"^(detr_min[./])?((release|data|run)[./])?", "", word.strip("`"))
        word = word.removesuffix("()")
        return self.anchors.get(word) or self.anchors.get(f"{here}.{word}")

    def in_words(self, text, here):
        """HTML of docstring text: code between backticks, equation tags, links."""
        def mark(found):
            code = f"<code>{found[1]}</code>"
            href = self.word(html.unescape(found[1]), here)
            return f'<a href="{href}">{code}</a>' if href else code
        text = re.sub(r"`([^`\n]+)`", mark, html.escape(text, quote=False))
        return re.sub(r"(\[[^\]\[]*(?:Eq|Sec|App|Fig|Alg|Table)\b[^\]\[]*\])",
                      r'<span class="tag">\1</span>', text)

    def in_code(self, code, here):
        """Pygments' HTML with `module.name` and calls of the page's own functions linked."""
        def outside(found):
            href = self.anchors.get(f"{found[1]}.{found[2]}")
            return f'<a href="{href}">{found[0]}</a>' if href else found[0]

        def own(found):
            href = self.anchors.get(f"{here}.{found[2]}")
            return f'<a href="{href}">{found[1]}</a>{found[3]}' if href else found[0]
        code = re.sub(r'<span class="n">(\w+)</span><span class="o">\.</span>'
                      r'<span class="n">(\w+)</span>', outside, code)
        return re.sub(r'(?<!\.</span>)(<span class="n">(\w+)</span>)(<span class="p">\()', own,
                      code)


def joined(lines):
    """Lines whose break came from the editor alone, put together again; indented ones stay."""
    out = []
    for line in lines:
        if out and len(out[-1].split("\n")[-1]) >= WRAPPED and not indent(line) + indent(out[-1]):
            out[-1] += "\n" + line.strip()
        else:
            out.append(line)
    return [line.replace("\n", " ") for line in out]


def indent(line):
    return len(line) - len(line.lstrip())


def typeset(doc, say):
    """HTML of a docstring in the house's form; `say` makes HTML of running text.

    Paragraphs flow. A later paragraph with indented lines or columns is a formula: monospace, its
    lines and spaces kept. Args, Returns, Raises become lists of names and meanings.
    """
    out = []
    doc = re.sub(r"\n(?=(Args|Returns|Raises|Yields|Differs):)", "\n\n", doc)
    for block in re.split(r"\n[ \n]*\n", doc) if doc else ():
        lines = block.split("\n")
        if re.match(r"(Args|Returns|Raises|Yields|Differs):", lines[0]):
            out += listing(lines, say)
        elif (out or block[0] == "[") and any(re.search(r"^ |\S  +\S", line) for line in lines):
            rows = "".join(f"<div>{say(line)}</div>" for line in joined(lines))
            out.append(f'<div class="eq">{rows}</div>')
        else:
            lead = "" if out else ' class="lead"'
            out.append(f"<p{lead}>{say(' '.join(lines))}</p>")
    return "\n".join(out)


def listing(lines, say):
    """HTML of Args:, Returns:, ... with what they list."""
    out, items = [], []

    def close():
        for item in items:
            head, *rest = re.split(r"  +", item)
            if rest:
                middle = "".join(f"<code>{say(cell)}</code> &ensp;" for cell in rest[:-1])
                out.append(f'<div class="item"><code><b>{say(head)}</b></code> &ensp;{middle}'
                           f"{say(rest[-1])}</div>")
            else:
                out.append(f'<div class="item">{say(head)}</div>')
        items.clear()
    listed = depth = None
    for line in lines:
        header = re.match(r"(Args|Returns|Raises|Yields|Differs):\s*(.*)", line)
        if header:
            close()
            listed, depth = header[1] in ("Args", "Raises"), None
            out.append(f"<h3>{header[1]}</h3>")
            items += [header[2]] * bool(header[2])
            continue
        depth = indent(line) if depth is None else depth
        if items and (not listed or indent(line) > depth):
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    close()
    return out


def module_page(name, links):
    """Body of the page of one source file."""
    sections = [{"name": inner, "docs_text": "", "doc": doc, "code_text": code}
                for inner, doc, code in cut(source(name).read_text())]
    pycco.main.highlight(sections, pycco.main.get_language("x.py", ""), outdir=".")
    out = []
    for i, part in enumerate(sections):
        def say(text):
            return links.in_words(text, name)
        path = source(name).relative_to(ROOT)
        heading = f"<h1>{path}</h1>" if i == 0 else f"<h2>{part['name']}</h2>" * bool(part["name"])
        out.append(f'<div class="section" id="{part["name"] or f"part{i}"}"><div class="docs">'
                   f'{heading}{typeset(part["doc"], say)}</div>'
                   f'<div class="code">{links.in_code(part["code_html"], name)}</div></div>')
    return "\n".join(out)


def guide_page(path, links):
    """Body of the page of a Markdown file of docs/; its links lead to pages where there are any."""
    text = re.sub(r"^(```\w+) .*$", r"\1", path.read_text(), flags=re.M)     # less a block's file
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc"])

    def target(found):
        file, hash_, anchor = found[1].partition("#")
        stem = pathlib.PurePosixPath(file).stem
        if file.endswith(".md") and stem in GUIDES or (
                file.endswith(".py") and "/tests/" not in file and stem in links.names):
            return f'href="{stem}.html{hash_}{anchor}"'
        return found[0] if "://" in file or not file else f'href="../{file}"'

    def name(found):
        href = links.word(html.unescape(found[1]), "")
        return f'<a href="{href}">{found[0]}</a>' if href else found[0]
    body = re.sub(r'href="([^"]*)"', target, body)
    body = re.sub(r"(?<!<pre>)<code>([\w./]+)</code>(?!</a>)", name, body)
    return f"<main>{body}</main>"


def index_page(links):
    """Body of the first page: guides, files in reading order, and the equations of both papers."""
    out, equations = ["<main><h1>detr_min</h1><p>"], {}
    out.append(" · ".join(f'<a href="{name}.html">{title}</a>' for name, title in GUIDES.items()
                          if (ROOT / "docs" / f"{name}.md").exists()))
    out.append("</p>")
    folder = None
    for name in links.names:
        here = source(name).parent.relative_to(ROOT).name.removeprefix("detr_min")
        here = "programs" if name in PROGRAMS else here
        if here != folder:
            out.append("</ol>" * (folder is not None)
                       + f"<h2>{FOLDERS.get(here, 'Programs')}</h2><ol>")
            folder = here
        sections = cut(source(name).read_text())
        first = re.split(r"(?<=\.)\s(?!\d)", sections[0][1].replace("\n", " "))[0]
        out.append(f'<li><a href="{name}.html"><code>{name}.py</code></a> '
                   f"{links.in_words(first, name)}</li>")
        for inner, doc, _ in sections:
            for paper, a, b in re.findall(r"\[(DAC|SD) Eq\. (\d)(?:-(\d))?\]", doc):
                for k in range(int(a), int(b or a) + 1) if inner else ():
                    places = equations.setdefault((paper, k), [])
                    places += [(name, inner)] * ((name, inner) not in places)
    out.append("</ol><h2>Equations</h2><table>")
    for (paper, k), places in sorted(equations.items()):
        where = ", ".join(f'<a href="{name}.html#{inner}"><code>{name}.{inner}</code></a>'
                          for name, inner in places)
        out.append(f'<tr><td class="tag">[{paper} Eq. {k}]</td><td>{where}</td></tr>')
    return "\n".join([*out, "</table></main>"])


def write(folder):
    """All pages into a folder. Returns their paths."""
    names = list(SOURCES)
    links, folder = Links(names), pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    colours = [line for line in pycco_resources.css.split("\n") if line.startswith("body .")]
    (folder / "style.css").write_text("\n".join(colours) + STYLE)
    if (ROOT / "docs" / "pictures").is_dir():
        shutil.copytree(ROOT / "docs" / "pictures", folder / "pictures", dirs_exist_ok=True)
    bodies = {"index": ("guide", "detr_min", index_page(links))}
    for name, title in GUIDES.items():
        if (ROOT / "docs" / f"{name}.md").exists():
            bodies[name] = "guide", title, guide_page(ROOT / "docs" / f"{name}.md", links)
    for name in names:
        bodies[name] = "module", f"{name}.py", module_page(name, links)
    for name, (kind, title, body) in bodies.items():
        beside = [("", "index", "index")]
        if name in names:
            i = names.index(name)
            beside += [("", other, f"{arrow} {other}.py") for arrow, other in
                       (("←", names[i - 1] if i else ""), ("→", [*names, ""][i + 1])) if other]
        else:
            beside += [("", other, words) for other, words in GUIDES.items() if other in bodies]
        nav = "".join(f'<a href="{other}.html">{words}</a>' for _, other, words in beside)
        (folder / f"{name}.html").write_text(
            PAGE.format(title=title, kind=kind, nav=nav, body=body), encoding="utf-8")
    return [folder / f"{name}.html" for name in bodies]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "docs" / "html", help="folder of pages")
    pages = write(parser.parse_args().out)
    print(f"{len(pages)} pages, {pages[0]}")
