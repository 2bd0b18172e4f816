"""``python -m sparse_comm``: the command ``sparse-comm`` where the script is not on PATH."""

from sparse_comm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
