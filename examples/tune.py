"""Choose a steering by text of your own, keep it as a preset, and use it.

python examples/tune.py MODEL PROFILE OUT TEXT_FILE [TEXT_FILE ...]
python examples/tune.py                    (the bundled model and the Python documentation, into tuned.confsteer)
"""

import sys
from pathlib import Path

import confsteer

if len(sys.argv) > 4:
    name, profile_name, out, *files = sys.argv[1:]
    texts = {Path(file).name: confsteer.read_texts(file) for file in files}
else:
    name, profile_name, out = None, "confsteer-demo", "tuned.confsteer"
    texts = {"Python documentation": confsteer.demo.texts()}

model, tokenizer = confsteer.load_model(name)
profile = confsteer.Profile.load(profile_name)
tuning = confsteer.tune(model, tokenizer, texts, profile, tokens=10_000, progress=True)
for text in tuning.texts:
    for row in text.rows:
        print(f"{text.source}, {row.name}: loss {row.metrics['loss'].value:.3f}, ECE {row.metrics['ece'].value:.4f}")
if not tuning.gained:
    sys.exit("Nothing to gain on text like this.")
tuned = profile.with_preset("calibrated", tuning.steering)
tuned.save(out)

inputs = tokenizer("A function is", return_tensors="pt")
with confsteer.steer(model, tuned, preset="calibrated"):
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]))
