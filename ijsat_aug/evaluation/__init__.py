"""What it bought: a model's accuracy under attacks, unseen threats and corruptions."""

from .corruptions import CORRUPTIONS, corrupt
from .credibility import doubts
from .render import to_html, to_markdown, to_table
from .report import Report, Result, Share
from .run import evaluate
from .threats import GROUPS, Threat, make_threat, select_threats
from .victim import Found, Victim

__all__ = [
    "CORRUPTIONS",
    "GROUPS",
    "Found",
    "Report",
    "Result",
    "Share",
    "Threat",
    "Victim",
    "corrupt",
    "doubts",
    "evaluate",
    "make_threat",
    "select_threats",
    "to_html",
    "to_markdown",
    "to_table",
]
