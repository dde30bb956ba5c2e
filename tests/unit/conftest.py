from __future__ import annotations

from hypothesis import settings

# How long an example takes says something about the machine that the tests share, not about Segue.
settings.register_profile("segue", deadline=None)
settings.load_profile("segue")
