// Swagger UI, from the files that the gateway has installed; it asks nobody else, no validator either.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null, tryItOutEnabled: true });
