"""Effects of steering on calibration, loss and entropy, beside the baselines that it has to beat.

metrics.py            every metric: its definition, its format, and which way is better
reader.py             a model reads each text once, for any number of steerings
fit.py                baselines and steerings fitted by gradient
comparison.py         ways to predict the same text, compared with each other
evaluate.py           `confsteer.evaluate`
choice_sample.py      multiple-choice questions, read once
answers.py            ways to answer them: temperatures, lengths, chance
choices.py            ways to answer, compared with each other
confidences.py        confidences in an answer that the model wrote
written_sample.py     short questions, answered in the model's own words
written.py            confidences in these answers, compared with each other
run_file.py           an evaluation as a file
lm_eval_model.py      a steered model for lm-eval
lm_eval_samples.py    the calibration of answers that lm-eval logged
"""
