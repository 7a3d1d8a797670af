"""The audit of dropout: faults that nobody sees, found in a step as it really runs.

The room is called ``auditing`` because `lightning_dropreg.audit` is the function.
"""

from lightning_dropreg.auditing.audit import audit
from lightning_dropreg.auditing.coverage import Coverage, Findings
from lightning_dropreg.auditing.findings import SEVERITIES, Finding

__all__ = ["SEVERITIES", "Coverage", "Finding", "Findings", "audit"]
