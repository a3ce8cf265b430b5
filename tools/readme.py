"""Write README.md from nbs/index.ipynb, without Quarto: markdown cells and the stored markdown outputs of its cells."""
import json
import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def readme() -> str:
    "Return the text of README.md."
    cells, parts = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"], []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(source)
        elif "#| hide" not in source:
            parts += ["".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data",
                                                                                                               {})]
    text = "\n\n".join(p.strip() for p in parts)
    text = re.sub(r"\]\(((?:figures/)?[\w.]+\.(?:ipynb|png))\)", r"](nbs/\1)", text) # links as seen from the top folder
    return "<!-- Made from nbs/index.ipynb by tools/readme.py: do not edit. -->\n\n" + text + "\n"


if __name__ == "__main__":
    path, text = root / "README.md", readme()
    if "--check" in sys.argv and path.read_text(encoding="utf-8") != text:
        sys.exit("README.md differs from nbs/index.ipynb: run python tools/readme.py")
    path.write_text(text, encoding="utf-8")
