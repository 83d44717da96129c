"""`python -m murmur` is the command `murmur`."""

from murmur.cli import main

if __name__ == "__main__":
    main()
