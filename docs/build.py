"""The documentation site, into build/site: `make docs`. Any warning is an error.

MkDocs gets a copy of docs/ in build/docs, to which this adds what is not written by hand:
- reference/settings.md and reference/cli.md from the code, and in api/ a page a module, of its public names;
- ARCHITECTURE.md, CHANGELOG.md and the READMEs of experiments/ and cluster/ as pages; a link between files of the
  repository becomes one between pages, or the text alone where its target is no page;
- notebooks as pages, with the outputs saved in them; formulas as MathML, which needs no script.
"""

import argparse
import base64
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import latex2mathml.converter
import nbformat
import yaml
from docstrings import as_markdown

import fedlq_ray
from fedlq_ray.cli.main import cli
from fedlq_ray.config.load import EVERY, describe
from fedlq_ray.config.schemes import SCHEMES, StrategyConfig, own_settings, readers
from fedlq_ray.config.sections import keys
from fedlq_ray.federation import metrics

ROOT = Path(__file__).parent.parent
METRICS_MARK = "<!-- metrics: the build of the site puts the table of federation/metrics.py here -->"
FROM_ELSEWHERE = (
    "ARCHITECTURE.md", "CHANGELOG.md", "cluster/**/README.md",
    "experiments/**/README.md", "experiments/**/*.png", "experiments/**/*.html",
)  # fmt: skip


def packages() -> list[str]:
    """The modules whose names are public: those with `__all__`."""
    found = [m.name for m in pkgutil.walk_packages(fedlq_ray.__path__, "fedlq_ray.")]
    return ["fedlq_ray", *(name for name in found if hasattr(importlib.import_module(name), "__all__"))]


def api_page(module: str) -> str:
    """A module's docstring, and each of its public names."""
    found = importlib.import_module(module)
    head = f"# {module}\n\n{as_markdown(found.__doc__ or '')}\n\n"
    return head + "\n\n".join(f"::: {module}.{name}" for name in found.__all__) + "\n"


def settings_page() -> str:
    """Every key of the configuration, by section."""
    lines = [
        "# Settings\n",
        "Every key of a configuration, made from `fedlq_ray/config/settings.py`. In YAML a dot is a level; on the",
        "command line it is `train.lr=0.05`. `fedlq config` prints all with the values that a run would have.",
    ]
    section = None
    for path, field, default in keys(EVERY):
        head, _, name = path.rpartition(".")
        if head != section:
            section = head
            lines += [f"\n## {head or 'The run'}\n", "| key | default | meaning |", "| --- | --- | --- |"]
        plain = list(default) if isinstance(default, tuple) else default
        value = yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n")[0]
        meaning = describe(path, field).replace("|", "\\|").replace("<", "&lt;")
        if head == "strategy" and name not in StrategyConfig.model_fields:
            meaning += f" ({', '.join(readers(name)) or 'a strategy of your own'})"
        lines.append(f'| <span id="{path}">`{path}`</span> | `{value}` | {meaning} |')
    return "\n".join([*lines, *own_settings_pages()]) + "\n"


def own_settings_pages() -> list[str]:
    """The settings that one strategy alone has, a table per strategy."""
    lines = []
    for name, kind in SCHEMES.items():
        own = own_settings(kind)
        if own:
            lines += [f"\n## strategy, name={name}\n", "| key | default | meaning |", "| --- | --- | --- |"]
        for setting in own:
            field = kind.model_fields[setting]
            meaning = describe(f"strategy.{setting}", field).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `strategy.{setting}` | `{json.dumps(field.default)}` | {meaning} |")
    return lines


def cli_page() -> str:
    """The help of each command."""
    parts = ["# Commands\n\nWhat `fedlq COMMAND --help` prints.\n"]
    for name, command in [("", cli), *sorted(cli.commands.items())]:
        context = click.Context(command, info_name=f"fedlq {name}".strip(), max_content_width=96, terminal_width=96)
        parts.append(f"## {context.info_name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def notebook_page(file: Path, folder: Path) -> str:
    """A notebook's cells and the outputs that are saved in it; its pictures become files of `folder`."""
    parts = []
    for number, cell in enumerate(nbformat.read(file, 4).cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{file.stem}_{number}.png"
                (folder / picture).write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![{cell.metadata['alt']}]({picture})")
            elif "text/html" in data:
                parts.append(
                    re.sub(r'<style.*?</style>|\n *| border="1" class="dataframe"', "", data["text/html"], flags=re.S)
                )
            else:
                parts.append(f"```text\n{(data.get('text/plain') or output.get('text', '')).rstrip()}\n```")
    return "\n\n".join(parts) + f"\n\nTo run it yourself: `docs/notebooks/{file.name}`.\n"


LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s#:]+)(#[^()\s]*)?\)")


def relink(text: str, page: Path, source: Path, pages: dict[Path, Path]) -> str:
    """A page's links to files of the repository as links to pages.

    Args:
        page: its place in the site; source: its file in the repository.
        pages: the place in the site of each file of the repository that has one.
    """

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        meant = (source.parent / target).resolve()
        meant = meant / "README.md" if meant.is_dir() else meant
        if meant in pages:
            return f"{label}({os.path.relpath(pages[meant], page.parent)}{anchor or ''})"
        return label.strip("![]") if meant.exists() else match[0]  # MkDocs tells of what is nowhere

    return LINK.sub(link, text)


CODE = re.compile(r"(^```math\n.*?^```$|^ *```.*?^ *```$|`[^`\n]+`)", re.S | re.M)


def formulas(text: str) -> str:
    """Formulas as GitHub has them, a block ```math and $inline$, as MathML."""

    def mathml(latex: str, display: str) -> str:
        found = latex2mathml.converter.convert(latex.strip(), display=display)
        for sign in "*_|\\`$":  # what Markdown would read
            found = found.replace(sign, f"&#{ord(sign)};")
        return f"<div>{found}</div>" if display == "block" else f"<span>{found}</span>"

    parts = CODE.split(text)
    for i, part in enumerate(parts):
        if part.startswith("```math"):
            parts[i] = f"\n{mathml(part[7:-3], 'block')}\n"
        elif i % 2 == 0:
            parts[i] = re.sub(
                r"(?<![\\$\w])\$([^$\n](?:[^$]*?[^\s$])?)\$(?!\w)", lambda m: mathml(m[1], "inline"), part
            )
    return "".join(parts)


def stage(folder: Path) -> None:
    """The pages, in `folder`/docs, and the configuration of MkDocs beside them."""
    docs = folder / "docs"
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("*.py", "*.ipynb", "__pycache__"))
    sources = {file: docs / file.relative_to(ROOT / "docs") for file in (ROOT / "docs").rglob("*")}
    sources |= {file: docs / file.relative_to(ROOT) for pattern in FROM_ELSEWHERE for file in ROOT.glob(pattern)}
    made = {docs / "reference/settings.md": settings_page(), docs / "reference/cli.md": cli_page()}
    made |= {docs / f"api/{module}.md": api_page(module) for module in packages()}
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        sources[notebook] = (docs / f"notebooks/{notebook.stem}").with_suffix(".md")
        sources[notebook].parent.mkdir(exist_ok=True)
        made[sources[notebook]] = notebook_page(notebook, docs / "notebooks")
    for page, text in made.items():
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, encoding="utf-8")
    for source, page in sources.items():
        if page.suffix == ".md" and page.name != source.name:  # a notebook's
            text = page.read_text(encoding="utf-8")
            page.write_text(formulas(relink(text, page, source, sources)), encoding="utf-8")
        elif page.suffix == ".md":
            page.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8").replace(METRICS_MARK, metrics.table())
            page.write_text(formulas(relink(text, page, source, sources)), encoding="utf-8")
        elif source.suffix in (".png", ".html"):
            page.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, page)
    config: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    for entry in config["nav"]:
        if "Results" in entry:
            entry["Results"] += sorted(
                f"experiments/{f.parent.name}/README.md" for f in ROOT.glob("experiments/*/README.md")
            )
        if "API" in entry:
            entry["API"] += [f"api/{module}.md" for module in packages()]
    python = next(plugin["mkdocstrings"] for plugin in config["plugins"] if "mkdocstrings" in plugin)["handlers"][
        "python"
    ]
    python["paths"], python["options"]["extensions"] = [str(ROOT)], [str(ROOT / "docs/docstrings.py")]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of docs/ (the pages) and site/")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    stage(out)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(out / "mkdocs.yml")]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
