"""Credentials are taken out of whatever is written: logs, configurations, parameters."""

import logging
import re

SECRETS = re.compile(r"(?i)((?:password|passwd|pwd|token|secret|api_?key|access_?key|credential|signature)[\w-]*=)"
                     r"[^&\s'\"]*")
"""What a key says is a secret, and its value."""
USERS = re.compile(r"//\S*@")
"""What stands before an address's host."""


def without_credentials(text: str) -> str:
    """A text whose addresses have lost what stands before their @, and passwords, keys and tokens in their queries."""
    return SECRETS.sub(r"\1...", USERS.sub("//", text))


def scrub(value: object) -> object:
    """Texts in dicts, lists and tuples without credentials; everything else as it is."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(scrub(item) for item in value)
    return value


def redact_logs() -> None:
    """Every record of this process is logged without credentials, whoever logs it and wherever it goes."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def redacted(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # of a malformed call, which `logging` itself reports
            return record
        clean = without_credentials(text)
        if clean != text:
            record.msg, record.args = clean, ()
        return record

    redacted.redacts = True
    logging.setLogRecordFactory(redacted)
