"""Where the event log is told on: files, TensorBoard, MLflow, a webhook. A sink never harms a run.

[[coordinator.sinks]]
kind = "mlflow"
url = "http://mlflow.example:5000"
"""

from .following import Follower, Pull, Sink, Source, tell
from .settings import SinkSettings, open_sink

__all__ = ["Follower", "Pull", "Sink", "SinkSettings", "Source", "open_sink", "tell"]
