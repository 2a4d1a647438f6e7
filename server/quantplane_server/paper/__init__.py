"""The paper broker: fills orders at the quotes of the market, with nobody's money.

An ordinary client, of any server. `book` decides, and is pure; `broker` talks.
"""
