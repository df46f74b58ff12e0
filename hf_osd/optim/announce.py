"""One line to the user at the beginning of a training, seen even where nobody has set up logging."""

import logging


logger = logging.getLogger("hf_osd")


def announce(line: str) -> None:
    """Log `line`, to the standard error stream if nothing else takes it."""
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
    logger.info(line)
