"""`python -m hf_osd`, the same as `hf-osd`."""

from .cli.main import main


if __name__ == "__main__":
    main()
