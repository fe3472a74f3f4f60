"""The paper's measurements beyond calibration (Stolfo et al. 2024, arXiv 2406.16254).

repetition.py    stretches of tokens that are read twice, random and natural ones
induction.py     entropy neurons when a text repeats itself
cumulative.py    entropy neurons ablated one after another, against random ones
heads.py         induction heads, and the entropy neurons that they drive
"""
