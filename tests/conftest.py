import os


os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
# Read by torch when it is imported. Tiny models are no faster with more threads, and much slower beside other work
os.environ.setdefault("OMP_NUM_THREADS", "1")

import modeling_vwlmm  # noqa: E402, F401
