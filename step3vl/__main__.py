"""python -m step3vl"""

from step3vl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
