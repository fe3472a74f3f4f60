"""Results of measurements: numbers with intervals, in frozen records that go to JSON and back.

result.py       the base of every record
bootstrap.py    intervals over blocks of tokens, paired where two estimates have the same blocks
"""
