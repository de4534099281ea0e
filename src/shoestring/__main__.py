"""``python -m shoestring``: the same as the command ``shoestring``."""

from shoestring.cli import main

if __name__ == "__main__":
    main()
