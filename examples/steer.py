"""One prompt at three entropies, one steering per row of the batch.

python examples/steer.py
"""

import torch

import confsteer
from confsteer import Steering, demo

model, tokenizer, profile = demo.load()
print("entropy neurons:", [neuron.index for neuron in profile.entropy_neurons])
print("reach of the entropy dial: {:+.2f} to {:+.2f} nats".format(*profile.reach("entropy")))

asked = [Steering(entropy=-0.15), Steering(), Steering(entropy=+0.3)]
prompts = tokenizer(["It was the best of times, it was"] * 3, return_tensors="pt")
with confsteer.steer(model, profile, asked):
    torch.manual_seed(0)
    output = model.generate(**prompts, do_sample=True, max_new_tokens=30, pad_token_id=tokenizer.eos_token_id)
for steering, text in zip(asked, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
    print(f"{steering!s:>14}: {text!r}")
