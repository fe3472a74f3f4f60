"""Tuning: the search for the steering that suits a text.

tune.py          `confsteer.tune`
tune_answers.py  the same on answers to questions
splits.py        a text in four parts: to tune on, to stop by, to validate and to report on
parameters.py    the tuned parameters, as a steering and as tensors
"""
