"""Run the command line: ``python -m flatlora.report RUN ...``."""

from . import main

main()
