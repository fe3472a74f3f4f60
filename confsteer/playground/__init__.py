"""A page to try the dials: one prompt, neutral and steered, token by token. It uses the OpenAI-compatible API.

page.py           the page, in one file that needs only the server it came from
description.py    a server's description of what it can steer, for the page and for clients
"""
