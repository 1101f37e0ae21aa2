"""A learner of two ranks: `python -m tests.learner.two_learners RANK PORT BOOTSTRAP START DATA_DIR SHARD`."""

import logging
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from learner.ranks import Ranks
from learner.run import Learner, LearnerError
from streams.settings import KafkaSettings
from tests.learner.cluster import PARTITIONS
from tests.learner.lineage import HASTY, POLICY


def main(rank: str, port: str, bootstrap: str, start: str, data_dir: str, shard: str) -> int:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2"}
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    logging.basicConfig(level=logging.INFO)
    ranks = Ranks.join()
    kafka = KafkaSettings(bootstrap=bootstrap, partitions=PARTITIONS)
    settings = replace(HASTY, shard=shard == "shard")
    learner = Learner(kafka, POLICY, settings, Path(data_dir), ranks)
    try:
        learner.start(Path(start))
        learner.run(stop)
    except LearnerError as error:
        print(f"ended: {error}")
        return 3
    learner.close()
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
