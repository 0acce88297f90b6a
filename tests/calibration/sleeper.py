"""An engine that never gets ready."""

import time

time.sleep(300)
