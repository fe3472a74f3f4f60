"""Output for people: tables in a terminal, pictures, one HTML file.

printable.py    strings from anyone, for a terminal or a picture
columns.py      tables by their columns, for a terminal, Markdown and CSV
tables.py       tables of profiles, scans, evaluations and studies
answer_tables.py    tables of answers to questions
written_tables.py   tables of answers in a model's own words
plots.py        pictures
results.py      the files that ``--json`` wrote, read back
findings.py     what the numbers say, in words that go no further than the intervals
answer_findings.py    the same of answers to questions
written_findings.py    the same of answers in a model's own words
figures.py      pictures for the page, with what they say to whom does not see them
page.py         the page
"""
