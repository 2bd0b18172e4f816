"""A target, and whether what was measured reaches it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A target and whether it is reached."""

    where: str
    text: str
    got: str
    wanted: str
    reached: bool

    def sentence(self, mark: str = "**") -> str:
        """Of one line; what is missed stands between marks."""
        reached = "Reached" if self.reached else f"{mark}Missed{mark}"
        return f"{reached}: {self.where}: {self.text}: {self.got}; wanted: {self.wanted}."
