from titans_video.api import TrainedRun as TrainedRun
from titans_video.api import train as train
from titans_video.generation.video_pipeline import VideoPipeline as VideoPipeline

__version__: str
__all__ = ["TrainedRun", "VideoPipeline", "train"]
