from quantplane_server.cli import app

app()
