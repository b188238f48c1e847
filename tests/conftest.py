import os
from pathlib import Path

import torch

# Graphs are exported once for all tests, and none into the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache/exitlm")

torch.set_num_threads(1)  # tiny models: threads cost more than they bring
