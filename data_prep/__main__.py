"""`python -m data_prep` is `mbtrain-prep`."""

from data_prep.cli import main

if __name__ == "__main__":
    main()
