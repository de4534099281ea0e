"""Write the sample sheets of the zoo into docs/images, to be looked at: python scripts/zoo_sheets.py [NAME ...]"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from shoestring import zoo
from shoestring.zoo.train import script

IMAGES = Path(__file__).parent.parent / "docs/images"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or zoo.names():
        if hasattr(script(name), "sheet"):
            sheet = script(name).sheet(partial(zoo.load, name))
            if isinstance(sheet, str):
                (IMAGES / f"{name}.txt").write_text(sheet, "utf-8")
            else:
                sheet.save(IMAGES / f"{name}.png", optimize=True)
            print(name)


if __name__ == "__main__":
    main()
