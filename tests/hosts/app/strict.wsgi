import anyfork
anyfork.install(strict=True)

from hosted import application
