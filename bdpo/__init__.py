"""bdpo: gradient imbalance in direct preference optimisation, audited statement by statement.

Importing the package loads nothing else; import the room you need, ``from bdpo import losses``.
"""

__version__ = "0.1.0"
