"""Keeps the warnings of libraries out of what the local commands print."""

import logging
import os
import warnings

_NOWHERE = logging.NullHandler()


def quiet_libraries() -> None:
    """Drop the warnings of libraries, in this process and those that it forks; the trainer's own stay.

    A step of `qlora run` has them in its log.
    """
    warnings.simplefilter("ignore")
    # Read by the libraries when they are imported; a user's own choice stays.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Without any handler, Python prints the warnings of all loggers.
    logging.getLogger().addHandler(_NOWHERE)
    if logging.lastResort is not None:
        logging.getLogger("qlora_trainer").addHandler(logging.lastResort)
