"""What the recipes share: arguments, methods, data of one's own, training, results, and the estimate for a GPU."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/, for `common`
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loaders of the Trainer fork
