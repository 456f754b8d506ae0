"""`python -m edgeroute`: the same command line as the `edgeroute` script."""

from edgeroute.cli import main

if __name__ == "__main__":
    main()
