# uWSGI runs its first application in the main interpreter: this one takes the place.
def application(environ, start_response):
    start_response("204 No Content", [])
    return []
