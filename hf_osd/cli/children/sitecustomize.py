"""Python imports this at its start where this folder is in PYTHONPATH: in processes that `hf-osd run` has started.

It registers the names there, and leaves the process as if the folder had not been in its path. Another interpreter,
which does not have hf_osd, goes on without.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec


sys.path[:] = [path for path in sys.path if path != os.path.dirname(__file__)]
if find_spec("hf_osd") is not None:
    import hf_osd  # noqa: F401 - registers the names
ours = sys.modules.pop(__name__)
if find_spec(__name__) is None:
    sys.modules[__name__] = ours
else:
    import_module(__name__)  # that of the interpreter or the user, which ours has hidden
