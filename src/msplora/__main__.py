"""``python -m msplora`` is ``msplora``."""

from .cli.app import main

if __name__ == "__main__":
    main()
