# What a user adds to an application's WSGI file: two lines.
import anyfork
anyfork.install()

from hosted import application
