"""What an operator may set about the simulated viewers."""

from dataclasses import dataclass

from storage.settings import Count, NotNegative, Positive, Whole


@dataclass(frozen=True)
class SimulateSettings:
    """Simulated viewers, who call the actor as an app's backend would."""

    requests_per_s: Positive = 100.0
    """Slates asked for per second (wall clock), both arms together."""
    slate: Count = 6
    """Items asked for in each request."""
    pace: Positive = 20.0
    """Divides the waiting between a viewer's events; play time and duration stay world seconds."""
    people: Count = 1500
    """Viewers; each exists as twins, one per arm."""
    items: Count = 3000
    """Items of the catalogue."""
    churn_per_s: NotNegative = 0.0
    """Items that leave the catalogue or come back, per second; at most a tenth of them is away."""
    seed: Whole = 7
    """Seed of the world: tastes, items, visits and every viewer's choices."""
