"""``python -m anyfork``: the command line."""

from anyfork._cli import main

raise SystemExit(main())
