"""ConfigurationService: values under keys, the servers' own settings among them."""

from google.protobuf.json_format import ParseDict

from quantplane import v1 as pb
from quantplane.v1 import configurations_pb2_grpc as rpc
from quantplane_server.db import Database
from quantplane_server.errors import UnknownConfiguration
from quantplane_server.reference import changes, checks, pages, queries
from quantplane_server.reference.queries import CONFIGURATIONS
from quantplane_server.reference.settings import SETTINGS
from quantplane_server.rpc.caller import caller
from quantplane_server.rpc.interceptor import Context
from quantplane_server.tokens import Tokens


class ConfigurationService(rpc.ConfigurationServiceServicer):
    """Kept in the database, read by whoever needs a value when it is needed."""

    def __init__(self, db: Database, tokens: Tokens) -> None:
        self._db = db
        self._tokens = tokens

    # --- Changing ---

    async def CreateConfiguration(
        self, request: pb.CreateConfigurationRequest, context: Context
    ) -> pb.CreateConfigurationResponse:
        asked = request.configuration
        checks.check_create_configuration(asked)
        configuration = await changes.create(
            self._db, CONFIGURATIONS, asked, caller(context)
        )
        return pb.CreateConfigurationResponse(configuration=_served(configuration))

    async def UpdateConfiguration(
        self, request: pb.UpdateConfigurationRequest, context: Context
    ) -> pb.UpdateConfigurationResponse:
        checks.check_update_configuration(request)
        asked, fields = request.configuration, request.update_mask.paths
        configuration = await changes.update(
            self._db, CONFIGURATIONS, asked, fields, caller(context)
        )
        if configuration is None:
            raise UnknownConfiguration(asked.key)
        return pb.UpdateConfigurationResponse(configuration=_served(configuration))

    async def DeleteConfiguration(
        self, request: pb.DeleteConfigurationRequest, context: Context
    ) -> pb.DeleteConfigurationResponse:
        checks.check_key(request)
        key, etag = request.key, request.etag
        await changes.delete(self._db, CONFIGURATIONS, key, etag, caller(context))
        return pb.DeleteConfigurationResponse()

    # --- Reading ---

    async def GetConfiguration(
        self, request: pb.GetConfigurationRequest, context: Context
    ) -> pb.GetConfigurationResponse:
        checks.check_key(request)
        key = request.key
        async with self._db.connection() as conn:
            found = await queries.find(conn, CONFIGURATIONS, [key])
        if key not in found and key not in SETTINGS:
            raise UnknownConfiguration(key)
        configuration = found.get(key, pb.Configuration(key=key))
        return pb.GetConfigurationResponse(configuration=_served(configuration))

    async def ListConfigurations(
        self, request: pb.ListConfigurationsRequest, context: Context
    ) -> pb.ListConfigurationsResponse:
        checks.check_list_configurations(request)
        behind, limit = pages.begin(self._tokens, request)
        async with self._db.transaction(readonly=True) as conn:
            rows = queries.configurations_after(
                conn, behind, request.prefix, list(SETTINGS), limit + 1
            )
            page, more = await pages.cut(rows, limit)
        response = pb.ListConfigurationsResponse(configurations=map(_served, page))
        if more:
            response.next_page_token = pages.token_behind(
                self._tokens, request, page[-1].key
            )
        return response


def _served(configuration: pb.Configuration) -> pb.Configuration:
    """Return it with what is known of one of the servers' own keys."""
    setting = SETTINGS.get(configuration.key)
    if setting:
        configuration.known = True
        configuration.description = configuration.description or setting.description
        if not configuration.etag:
            ParseDict(setting.default, configuration.value)
    return configuration
