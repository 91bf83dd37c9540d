"""How many drafted tokens does a round accept on average, given how many it drafts?

The curve l(gamma) counts accepted draft tokens only: the token that the target adds to every round
is not among them, so a round commits 1 + l(gamma) tokens. A row's curve does not depend on how many
other rows share its batch.
"""
