"""A good request of every method, to be altered: what is wrong is the alteration."""

from typing import Any

from quantplane import Client
from quantplane import v1 as pb
from tests import models, options, orders, reference, signals
from tests.market_data import START_S

PASSWORD = "correct horse battery"
CHANGED = "bob"  # the user of UpdateUser


async def requests(client: Client) -> dict[str, Any]:
    """Make what the requests are about; return the requests by method."""
    user = pb.User(username="joe", email="joe@desk.test", role="viewer")
    await client.user.CreateUser(pb.CreateUserRequest(user=user, password=PASSWORD))
    changed = pb.User(username=CHANGED, email="bob@desk.test", role="viewer")
    await client.user.CreateUser(pb.CreateUserRequest(user=changed))
    login = pb.LoginRequest(username="joe", password=PASSWORD)
    sessions = [(await client.auth.Login(login)).tokens.refresh_token for _ in "12"]
    order, cancelled, replaced = [await orders.open_order(client) for _ in range(3)]
    sent, withdrawn = signals.signal(), signals.signal()
    await signals.publish(client, sent, withdrawn)
    for id in "sd":
        await reference.create(client, strategy_id=id, risk_limits={})
    for key in ("desk.k", "desk.d"):
        configuration = reference.configuration(key)
        await client.configuration.CreateConfiguration(
            pb.CreateConfigurationRequest(configuration=configuration)
        )
    new_key = pb.ApiKey(name="feed", role="viewer")
    key = (await client.user.CreateApiKey(pb.CreateApiKeyRequest(key=new_key))).key
    permission = pb.RolePermission(role="viewer", resource="orders", action="read")
    bar = pb.Bar(symbol="A", open=1, high=1, low=1, close=1)
    bar.time.seconds = START_S
    return by_method(
        pb.GetServerInfoRequest(),
        pb.GetServerStatusRequest(),
        pb.ListSubscriptionsRequest(),
        pb.GetStorageReportRequest(),
        pb.ListAuditLogsRequest(actions=["login"]),
        login,
        pb.RefreshTokenRequest(refresh_token=sessions[0]),
        pb.LogoutRequest(refresh_token=sessions[1]),
        pb.WhoAmIRequest(),
        pb.WatchBrokerCommandsRequest(),
        pb.ReportOrderEventsRequest(
            reports=[
                pb.OrderReport(
                    order_id=order.order_id,
                    type=pb.ORDER_EVENT_TYPE_ACKNOWLEDGED,
                    broker_order_id="b",
                )
            ]
        ),
        pb.ReportExecutionsRequest(reports=[orders.execution(order, 1)]),
        pb.CreateConfigurationRequest(configuration=reference.configuration("desk.n")),
        pb.GetConfigurationRequest(key="desk.k"),
        pb.ListConfigurationsRequest(),
        pb.UpdateConfigurationRequest(
            configuration=reference.configuration("desk.k", 2, description="d"),
            update_mask={"paths": ["value", "description"]},  # type: ignore[arg-type]
        ),
        pb.DeleteConfigurationRequest(key="desk.d"),
        pb.PublishQuotesRequest(feed="f", batch=0),
        pb.StreamQuotesRequest(symbols=["A"]),
        pb.SubscribeQuotesRequest(symbols=["A"]),
        pb.GetLatestQuotesRequest(symbols=["A"]),
        pb.PublishBarsRequest(batch=1, bars=[bar]),
        pb.ListBarsRequest(symbol="A"),
        pb.StreamBarsRequest(symbols=["A"]),
        pb.ListSymbolsRequest(),
        pb.PublishHestonRequest(parameters=[models.heston()]),
        pb.PublishSabrRequest(parameters=[models.sabr()]),
        pb.PublishOuRequest(parameters=[models.ou()]),
        pb.GetLatestHestonRequest(symbols=["A"]),
        pb.GetLatestSabrRequest(symbols=["A"]),
        pb.GetLatestOuRequest(pair_ids=["A"]),
        pb.ListHestonRequest(symbol="A"),
        pb.ListSabrRequest(symbol="A"),
        pb.ListOuRequest(pair_id="A"),
        pb.WatchModelsRequest(heston_symbols=["A"]),
        pb.PublishOptionChainRequest(batch=1, chain=options.chain(0, options.quote())),
        pb.GetOptionChainRequest(underlying="A"),
        pb.ListExpirationsRequest(underlying="A"),
        pb.SubscribeOptionChainRequest(underlyings=["A"]),
        pb.SubmitOrderRequest(order=orders.new_order()),
        pb.SubmitOrdersRequest(orders=[orders.new_order()]),
        pb.ValidateOrderRequest(order=orders.new_order()),
        pb.CancelOrderRequest(order_id=cancelled.order_id),
        pb.ReplaceOrderRequest(order_id=replaced.order_id, price=99),
        pb.GetOrderRequest(order_id=order.order_id),
        pb.ListOrdersRequest(),
        pb.ListExecutionsRequest(),
        pb.GetLineageRequest(order_id=order.order_id),
        pb.GetOrderLifecycleRequest(),
        pb.WatchOrdersRequest(),
        pb.GetPortfolioRequest(),
        pb.ListPositionsRequest(),
        pb.WatchPortfolioRequest(),
        pb.TakeSnapshotRequest(),
        pb.ListSnapshotsRequest(),
        pb.AuditPositionsRequest(),
        pb.PublishSignalsRequest(signals=[signals.full()]),
        pb.GetSignalRequest(signal_id=sent.signal_id),
        pb.ListSignalsRequest(),
        pb.CancelSignalRequest(signal_id=withdrawn.signal_id),
        pb.WatchSignalsRequest(),
        pb.CreateStrategyRequest(strategy=reference.strategy("n")),
        pb.GetStrategyRequest(strategy_id="s"),
        pb.ListStrategiesRequest(),
        pb.UpdateStrategyRequest(
            strategy=reference.strategy(risk_limits={}),
            update_mask={  # type: ignore[arg-type]
                "paths": ["name", "type", "status", "parameters", "risk_limits"]
            },
        ),
        pb.DeleteStrategyRequest(strategy_id="d"),
        pb.WatchStrategiesRequest(strategy_ids=["s"]),
        pb.CreateUserRequest(
            user=pb.User(username="new", email="new@desk.test", role="viewer")
        ),
        pb.GetUserRequest(username="joe"),
        pb.ListUsersRequest(),
        pb.UpdateUserRequest(
            user=changed,
            update_mask={"paths": ["email", "role"]},  # type: ignore[arg-type]
        ),
        pb.SetPasswordRequest(username="joe", new_password=PASSWORD),
        pb.ListPermissionsRequest(),
        pb.GrantPermissionRequest(permission=permission),
        pb.RevokePermissionRequest(permission=permission),
        pb.CreateApiKeyRequest(key=new_key),
        pb.ListApiKeysRequest(),
        pb.RevokeApiKeyRequest(key_id=key.key_id),
    )


def renew(request: Any, number: int) -> None:
    """Have a request make something new, where it makes something."""
    match request:
        case pb.CreateUserRequest():
            request.user.username = f"u{number}"
            request.user.email = f"u{number}@desk.test"
        case pb.CreateStrategyRequest():
            request.strategy.strategy_id = f"s{number}"
        case pb.CreateConfigurationRequest():
            request.configuration.key = f"desk.k{number}"
        case pb.PublishSignalsRequest():
            request.signals[0].signal_id = signals.signal().signal_id
        case pb.SubmitOrderRequest():
            request.order.client_order_id = f"n{number}"
        case pb.SubmitOrdersRequest():
            request.orders[0].client_order_id = f"n{number}"
        case pb.ReportExecutionsRequest():
            request.reports[0].broker_exec_id = f"n{number}"


def by_method(*requests: Any) -> dict[str, Any]:
    return {type(each).__name__.removesuffix("Request"): each for each in requests}
