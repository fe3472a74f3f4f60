"""Effects of steering on calibration, loss and entropy, beside the baselines it has to beat.

metrics.py            every metric: what it is, how it is shown, which way is better
reader.py             a model reads each text once, for any number of steerings
fit.py                baselines and steerings fitted by gradient
comparison.py         ways to predict the same text, held against each other
evaluate.py           `confsteer.evaluate`
choice_sample.py      multiple-choice questions, read once
answers.py            ways to answer them: temperatures, lengths, chance
choices.py            ways to answer, held against each other
confidences.py        confidences in an answer that the model wrote
written_sample.py     short questions, answered in the model's own words
written.py            confidences in these answers, held against each other
run_file.py           an evaluation as a file
lm_eval_model.py      a model of lm-eval that is steered
lm_eval_samples.py    the calibration of answers that lm-eval logged
"""
