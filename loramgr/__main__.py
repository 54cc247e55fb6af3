"""Runs the command line: `python -m loramgr` is `loramgr`."""

from loramgr.cli.main import main

if __name__ == "__main__":
    main()
