"""What the long-running commands have in common (llmplane.process)."""

import resource

from llmplane.process import allow_many_files


def test_a_process_may_open_as_many_files_as_the_system_lets_it() -> None:
    """A connection is one; the usual 1,024 would be too few for a thousand proxies."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
