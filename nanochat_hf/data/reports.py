"""What becomes of rows that are no conversation: an error, or left out and counted; more than half of them is an error either way."""

BAD_ROWS = ("error", "skip")
ENOUGH = 100  # rows of a stream after which a share of bad ones is told from chance


class BadRows:
    """Counts the rows of one source: `bad` of `seen`, and the first `reason`."""

    def __init__(self, seen=0, bad=0, reason=""):
        self.seen, self.bad, self.reason = seen, bad, reason

    def add(self, error):
        """Take in one row: None, or the ValueError that says what is wrong with it."""
        self.seen += 1
        if error is not None:
            self.bad += 1
            self.reason = self.reason or str(error)

    def check(self, label):
        """ValueError where more than half are bad."""
        if 2 * self.bad > self.seen:
            raise ValueError(
                f"{label}: {self.bad:,} of {self.seen:,} rows are bad, more than half; correct the data (the first: {self.reason})"
            )


def check_policy(policy):
    """ValueError where there is no such policy."""
    if policy not in BAD_ROWS:
        raise ValueError(f"--bad-rows {policy} is unknown; choose from {', '.join(BAD_ROWS)}")
