"""Calibrate a model of your own on your own text, save the profile, and evaluate it.

python examples/own_model.py MODEL TEXT_FILE
python examples/own_model.py                    (the bundled model and the Python documentation)
"""

import sys

import confsteer
from confsteer import Steering

name = sys.argv[1] if len(sys.argv) > 1 else None
model, tokenizer = confsteer.load_model(name)
texts = list(confsteer.read_texts(sys.argv[2])) if len(sys.argv) > 2 else confsteer.demo.texts()

counts = None if name else confsteer.demo.unigram_counts()  # of the bundled model's training text
profile = confsteer.calibrate(model, tokenizer, texts, tokens=10_000, unigram_counts=counts, progress=True)
profile.save("own.confsteer")
if not profile.entropy_neurons:
    sys.exit("This model has no entropy neurons.")

low, high = profile.reach("entropy")
result = confsteer.evaluate(
    model, tokenizer, texts, profile, [Steering(entropy=low / 2), Steering(entropy=high / 2)], tokens=5_000
)
for row in result.texts[0].rows:
    print(f"{row.name:>40}: loss {row.metrics['loss'].value:.3f}, ECE {row.metrics['ece'].value:.4f}")
