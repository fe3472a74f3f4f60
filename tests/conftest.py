import os

# Before any import of huggingface_hub: tests never reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

# Nothing is said about how long things take.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
